"""The search for a recipe: Alrao with parts that the papers have not."""

"""A vision-language model learns to describe new pictures, and keeps its language."""

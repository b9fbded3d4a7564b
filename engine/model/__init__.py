"""The Grok-1 transformer: weights declared once, layers as functions over them."""

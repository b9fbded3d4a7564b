"""The server speaks HTTP and text; it reaches the engine through `engine.client` and never imports jax."""

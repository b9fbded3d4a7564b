"""Wire types. What comes in is pydantic: strict, bounded, forgiving about unknown fields. What goes out is msgspec: about 1 us a chunk."""

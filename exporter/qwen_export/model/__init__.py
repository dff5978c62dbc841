"""The decoder that is traced, and its operators."""

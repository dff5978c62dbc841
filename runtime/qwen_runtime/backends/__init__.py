"""What executes a bundle: one protocol, one module per engine."""

"""How requests generate: one state machine per mode, none of which calls an engine."""

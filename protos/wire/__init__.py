"""Generated code; nothing outside `protos` imports it."""

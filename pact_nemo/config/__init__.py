"""The settings: schema, reading, recipes."""

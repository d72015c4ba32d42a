"""Plain data that crosses rooms and process borders. Imports the standard library and numpy only."""

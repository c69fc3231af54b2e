"""The notebook surface: magics, what a cell reads and binds, and where output goes. Nothing heavy is imported here."""

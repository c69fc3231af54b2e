"""What drivers and tasks call: decorators, verbs, refs and handles, above the engine seam (``nbray.engine.base``)."""

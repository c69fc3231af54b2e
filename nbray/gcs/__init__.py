"""The global control store: all control state in one place, so that everything else can be restarted."""

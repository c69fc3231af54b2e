"""Worker processes: the zygote that forks them, and what runs in them."""

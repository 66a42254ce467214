"""Every setting: its type, its default, its bounds, and one sentence under it. A file per YAML group."""

"""Weight files read lazily and without running anything of theirs; `read.open_file` is the way in."""

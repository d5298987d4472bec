"""Lists of captions and URLs -> pictures on disk, each row with a verdict; img2dataset is the engine."""

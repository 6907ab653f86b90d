"""One file a stage, each with its loop or its trainer's set-up in sight."""

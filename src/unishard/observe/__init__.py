"""What a run tells about itself: one record a step, written by monitors."""

"""What a run proves: before its first step that the right thing trains, and after its last that it was saved."""

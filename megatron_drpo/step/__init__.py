"""What one step of training does around the update: collect experience, batch it, publish the new weights."""

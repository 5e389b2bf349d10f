"""From sequences to packed micro-batches, split over context ranks."""

"""What a trainer reads: images, videos, pairs, and the seeds of what it draws."""

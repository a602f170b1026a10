"""Slides, tissue, geometry, coordinates, drawing: numpy, cv2 and OpenSlide. No torch."""

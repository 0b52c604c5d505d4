"""torch's map-style Datasets: samples that code makes one by one, in the order of this project."""

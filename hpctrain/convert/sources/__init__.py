"""What datasets are packed from: arrays, images, text and other HDF5, all seen as rows."""

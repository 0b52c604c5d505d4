"""What datasets are packed from: arrays, pictures, text and other HDF5, all seen as rows."""

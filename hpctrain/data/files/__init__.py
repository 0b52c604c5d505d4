"""What HDF5 files and folders of them hold, as far as training needs to know."""

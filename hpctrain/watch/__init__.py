"""Looking at runs from the files in their folders: a live page, a report. No torch, no MPI."""

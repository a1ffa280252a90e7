"""Models in and out of the files of Hugging Face."""

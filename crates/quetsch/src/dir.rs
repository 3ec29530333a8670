//! Hugging Face model directories: reading and writing.

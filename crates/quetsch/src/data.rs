//! Labelled texts: reading, sniffing, splitting, checking.

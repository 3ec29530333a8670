//! Hooks for [`With`](crate::ops::With): recording and masks.

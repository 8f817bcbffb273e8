//! Arithmetic that both sides must agree on, as pure functions.

pub mod crc32c;
pub mod hash;
pub mod timeout;

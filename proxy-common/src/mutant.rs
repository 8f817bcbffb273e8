//! How a mutant of the programs is named in a number: what they compare, and what their loader stores.

/// The number of a name; never 0, which is no mutant. FNV-1a.
pub const fn id(name: &str) -> u32 {
    let (bytes, mut hash, mut at) = (name.as_bytes(), 0x811c_9dc5_u32, 0);
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u32).wrapping_mul(0x0100_0193);
        at += 1;
    }
    if hash == 0 { 1 } else { hash }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_numbers_of_their_own() {
        assert_eq!(id(""), 0x811c_9dc5);
        assert_eq!(id("foobar"), 0xbf9c_f968);
        assert_ne!(id("rule-1"), id("rule-2"));
    }
}

//! `NAMES`: which Service port a port id is, for `bpftool`, the command line and restarts.

use crate::abi_struct;

abi_struct! {
    /// Value of `NAMES`, by port id.
    pub struct Name: 196 {
        /// `namespace/service:port`, NUL-padded; each part is a DNS label of at most 63 bytes.
        text: [u8; 192],
        /// IP protocol number.
        proto: u8,
        /// 4 or 6.
        family: u8,
        /// Zero.
        _pad: u16,
    }
}

impl Name {
    /// A name; text beyond 191 bytes cannot occur and is cut.
    pub fn new(text: &str, proto: u8, family: u8) -> Self {
        let mut bytes = [0; 192];
        for (to, from) in bytes[..191].iter_mut().zip(text.as_bytes()) {
            *to = *from;
        }
        Self { text: bytes, proto, family, _pad: 0 }
    }

    /// The text before the first NUL; empty if it is no UTF-8.
    pub fn as_str(&self) -> &str {
        let len = self.text.iter().position(|b| *b == 0).unwrap_or(self.text.len());
        core::str::from_utf8(&self.text[..len]).unwrap_or("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_fits() {
        let label = "a".repeat(63);
        let text = format!("{label}/{label}:{label}");
        assert_eq!(Name::new(&text, 6, 4).as_str(), text);
    }
}

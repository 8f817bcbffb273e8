//! What SCTP's checksum (CRC32c, RFC 9260 appendix A) becomes when the packet's first word changes.
//!
//! A CRC is linear: the difference of two packets of one length gives the difference of their sums. That of the first
//! word is the word's polynomial times x^(8·length), whatever the rest of the packet is.

/// The Castagnoli polynomial, lowest degree in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// 1 in this notation.
const ONE: u32 = 1 << 31;

/// Product of two polynomials.
#[inline(always)]
pub const fn times(a: u32, mut b: u32) -> u32 {
    let (mut product, mut bit) = (0, 0);
    while bit < 32 {
        // Masks and no branches: the verifier would follow each way.
        product ^= b & 0u32.wrapping_sub(a >> (31 - bit) & 1);
        b = b >> 1 ^ POLYNOMIAL & 0u32.wrapping_sub(b & 1);
        bit += 1;
    }
    product
}

/// x^(8·16^k·d), for each four bits k of a length and each value d that they can have.
static POWERS: [[u32; 16]; 4] = {
    let mut powers = [[ONE; 16]; 4];
    // x^8 is the ninth coefficient.
    let mut power = ONE >> 8;
    let mut k = 0;
    while k < 4 {
        let mut d = 1;
        while d < 16 {
            powers[k][d] = times(powers[k][d - 1], power);
            d += 1;
        }
        power = times(powers[k][15], power);
        k += 1;
    }
    powers
};

/// What the checksum's field, read as a little-endian word, changes by (exclusive or), if the first word of a packet of
/// this length, read as a little-endian word, does. `times` is [`times`], as the caller calls it.
#[inline(always)]
pub fn change(first_word: u32, length: u16, times: impl Fn(u32, u32) -> u32) -> u32 {
    let powers = POWERS.iter().enumerate();
    powers.fold(first_word, |change, (k, powers)| times(powers[usize::from(length >> (4 * k) & 15)], change))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the RFC has it.
    fn sum(bytes: &[u8]) -> u32 {
        let mut crc = !0u32;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
            }
        }
        !crc
    }

    #[test]
    fn the_sum_is_the_one_of_rfc_3720() {
        // RFC 3720 §B.4: thirty-two bytes of zeros.
        assert_eq!(sum(&[0; 32]), 0x8a91_36aa);
    }

    proptest::proptest! {
        #[test]
        fn a_change_of_the_first_word_changes_the_sum_by_this(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 4..3000),
            word: [u8; 4],
        ) {
            let mut other = bytes.clone();
            other[..4].copy_from_slice(&word);
            let differs = u32::from_le_bytes(word) ^ u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            assert_eq!(sum(&other), sum(&bytes) ^ change(differs, bytes.len() as u16, times));
        }
    }
}

//! What a hook gives the pipeline: the packet and what the kernel knows of it.

#[cfg(target_arch = "bpf")]
pub mod tc;

use proxy_common::Addr4;

/// Read access to a packet's bytes; what the parser needs. Two bodies: the kernel's buffer, and a slice in tests.
pub trait PacketCtx {
    /// Reads `T` at an offset from the first byte of the frame. `None`: the packet ends before.
    fn load<T: Plain>(&self, offset: u32) -> Option<T>;

    /// The same at an offset known when compiling, without a helper call where the bytes are at hand.
    #[inline(always)]
    fn load_at<T: Plain, const OFFSET: u32>(&self) -> Option<T> {
        self.load(OFFSET)
    }
}

/// Types for which every byte pattern is a value.
///
/// # Safety
///
/// `repr(C)`, no padding, integers and arrays of them only.
pub unsafe trait Plain: Copy {}

// SAFETY: integers and arrays of integers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for Addr4 {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u8; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u32; N] {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [[u32; N]; 2] {}

#[cfg(not(target_arch = "bpf"))]
impl PacketCtx for [u8] {
    fn load<T: Plain>(&self, offset: u32) -> Option<T> {
        let offset = offset as usize;
        let bytes = self.get(offset..offset.checked_add(size_of::<T>())?)?;
        // SAFETY: the slice is as long as T, and `Plain` allows every byte pattern.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

//! The time in seconds, without asking the kernel's clock for each packet: that is a call, and a division.

use crate::ctx::tc;
use crate::maps;

/// Ticks during which the time read last is believed: 0.06 s at 1,000 Hz, 0.64 s at 100 Hz. Entries live for seconds.
const TICKS: u32 = 6;

/// Seconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now_secs() -> u32 {
    // One word, so that no CPU sees half of another's: the tick above, the seconds below.
    let tick = tc::jiffies() >> TICKS << 32;
    let Some(clock) = maps::clock() else { return read() };
    // SAFETY: an array's element; one aligned word.
    let held = unsafe { clock.read_volatile() };
    if held >> 32 << 32 == tick {
        return held as u32;
    }
    let now = read();
    // SAFETY: as above.
    unsafe { clock.write_volatile(tick | u64::from(now)) }
    now
}

/// Seconds since then. None of another CPU's or another build's time, which may be a tick ahead of ours.
#[inline(always)]
pub(crate) fn secs_since(then: u32) -> u32 {
    let secs = now_secs().wrapping_sub(then);
    if secs.cast_signed() < 0 { 0 } else { secs }
}

#[inline(always)]
fn read() -> u32 {
    (tc::now_ns() / 1_000_000_000) as u32
}

//! Where a translated packet goes: on to the stack as a rule; past it only where the stack would get it wrong.

use proxy_common::abi::{Device, Direction, Flow, FlowKey, tc_index};
use proxy_common::{Family, Outcome};

use super::flow::read;
use super::rewrite;
use crate::ctx::tc::{self, FLAT, Fib, HelperError, Skb};
use crate::hook::Leave;
use crate::maps;

/// Sends the packet where its flow says. `flow` may lie in a map: each of its fields is read once.
#[inline(always)]
pub(crate) fn forward<F: Family>(
    skb: &Skb,
    flow: *const Flow<F>,
    key: &FlowKey<F>,
    outcome: Outcome,
) -> (Outcome, Leave) {
    let flags = read!(flow, flags);
    let reply = flags & Flow::<F>::REPLY != 0;
    // For the egress hook that a redirected packet meets at once, and that any other meets after the stack.
    if !mutant!("no-handshake") {
        skb.set_tc_index(told::<F>(flags));
    }
    let outcome = named::<F>(flags, outcome);
    if flags & (Flow::<F>::REINJECT | Flow::<F>::HAIRPIN | Flow::<F>::REDIRECT | Flow::<F>::BRIDGED) == 0 {
        return (outcome, Leave::NEXT);
    }
    let done = if flags & Flow::<F>::REINJECT != 0 {
        // The reply to a process of the node arrives by the device its request left by: socket and rp_filter see the
        // Service's address where its route points.
        if FLAT {
            if rewrite::dress(skb.as_ptr(), flow) == 0 {
                Ok(tc::redirect_in(read!(flow, ifindex)))
            } else {
                Err(HelperError)
            }
        } else {
            rewrite::next_hop(skb, &read!(flow, entry_mac)).map(|()| tc::redirect_in(read!(flow, ifindex)))
        }
    } else if flags & Flow::<F>::HAIRPIN != 0 {
        if key.dir == Direction::Out as u8 || !goes_back_here(skb) {
            return (outcome, Leave::NEXT);
        }
        rewrite::turn_round(skb).map(|()| tc::redirect_out(skb.ifindex()))
    } else if flags & Flow::<F>::REDIRECT != 0 && !reply {
        if FLAT { skb.push_ethernet() } else { Ok(()) }.map(|()| tc::redirect_neighbour(read!(flow, ifindex)))
    } else {
        let mac = read!(flow, next_mac);
        if is_bridged::<F>(flags)
            && !is_unknown(&mac)
            && key.dir == Direction::In as u8
            && rewrite::next_hop(skb, &mac).is_err()
        {
            return (Outcome::DropHelper, Leave::NEXT);
        }
        return (outcome, Leave::NEXT);
    };
    match done {
        Ok(verdict) => (outcome, Leave::redirected(verdict)),
        Err(_) => (Outcome::DropHelper, Leave::NEXT),
    }
}

/// False where somebody else judges the packet: the stack leads it back by the same device, past both of its hooks.
#[inline(always)]
fn goes_back_here(skb: &Skb) -> bool {
    maps::device(skb.ifindex())
        .is_some_and(|device| device.flags & Device::FOREIGN == 0 || mutant!("turned-past-foreign"))
}

/// What egress is told. A reply that has only got its client back is still to be translated on the way out.
#[inline(always)]
const fn told<F: Family>(flags: u16) -> u16 {
    let (reply, masquerade) = (flags & Flow::<F>::REPLY != 0, flags & (Flow::<F>::MASQUERADE | Flow::<F>::MASQUERADED));
    match (reply, masquerade) {
        (true, 0 | Flow::<F>::MASQUERADE) => tc_index::REPLY,
        (true, _) => tc_index::NOT_OURS,
        (false, Flow::<F>::MASQUERADE) => tc_index::REQUEST_SNAT,
        (false, _) => tc_index::REQUEST,
    }
}

/// Both exchanges of a masqueraded packet are counted: the second one by names of its own.
#[inline(always)]
fn named<F: Family>(flags: u16, outcome: Outcome) -> Outcome {
    let kept = matches!(outcome, Outcome::FlowsFull | Outcome::IcmpError | Outcome::Fragment);
    if flags & Flow::<F>::MASQUERADED == 0 || kept {
        return outcome;
    }
    if flags & Flow::<F>::REPLY != 0 { Outcome::Unmasqueraded } else { Outcome::Masqueraded }
}

/// True if the packet goes over the bridge it came in by: a request to its endpoint, or a masqueraded one's reply to its
/// client.
#[inline(always)]
pub(crate) const fn is_bridged<F: Family>(flags: u16) -> bool {
    flags & Flow::<F>::BRIDGED != 0 && (flags & Flow::<F>::REPLY != 0) == (flags & Flow::<F>::MASQUERADED != 0)
}

/// True while the next hop's MAC is not known: no device has one that begins with four zeros.
#[inline(always)]
pub(crate) const fn is_unknown(mac: &[u8; 6]) -> bool {
    mac[0] | mac[1] | mac[2] | mac[3] == 0
}

/// The MAC of an endpoint on the client's own bridge. `None`: the bridge does not lead there any more, or the neighbour
/// is not resolved yet; then the stack routes the packet and asks for it.
#[inline(always)]
pub(crate) fn bridge_next_hop<F: Family>(skb: &Skb, flow: *const Flow<F>) -> Option<[u8; 6]> {
    let bridge = read!(flow, ifindex);
    // SAFETY: a map's element; the addresses are copied once, into the question.
    let mut fib = unsafe { Fib::new::<F>(bridge, &(*flow).src, &(*flow).dst) };
    let result = skb.route(&mut fib, 0);
    (result == Fib::SUCCESS && fib.ifindex == bridge).then_some(fib.dmac)
}

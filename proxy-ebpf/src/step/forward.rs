//! Where a translated packet goes: on to the stack as a rule; past it only where the stack would get it wrong.

use proxy_common::abi::{Direction, Flow, FlowKey, tc_index};
use proxy_common::{Family, Outcome};

use super::rewrite;
use crate::ctx::tc::{self, Fib, Skb};
use crate::hook::Leave;

/// Sends the packet where its flow says.
#[inline(always)]
pub(crate) fn forward<F: Family>(skb: &Skb, flow: &Flow<F>, key: &FlowKey<F>, outcome: Outcome) -> (Outcome, Leave) {
    let reply = flow.flags & Flow::<F>::REPLY != 0;
    // For the egress hook that a redirected packet meets at once, and that any other meets after the stack.
    if !cfg!(feature = "mutant-no-handshake") {
        skb.set_tc_index(if reply { tc_index::REPLY } else { tc_index::REQUEST });
    }
    let done = if flow.flags & Flow::<F>::REINJECT != 0 {
        // The reply to a process of the node arrives by the device its request left by: socket and rp_filter see the
        // Service's address where its route points.
        rewrite::next_hop(skb, &flow.entry_mac).map(|()| tc::redirect_in(flow.ifindex))
    } else if flow.flags & Flow::<F>::HAIRPIN != 0 {
        rewrite::swap_macs(skb).map(|()| tc::redirect_out(flow.ifindex))
    } else if flow.flags & Flow::<F>::REDIRECT != 0 && !reply {
        Ok(tc::redirect_neighbour(flow.ifindex))
    } else {
        let bridged = flow.flags & (Flow::<F>::BRIDGED | Flow::<F>::REPLY) == Flow::<F>::BRIDGED;
        let known = flow.next_mac[0] | flow.next_mac[1] | flow.next_mac[2] | flow.next_mac[3] != 0;
        if bridged && known && key.dir == Direction::In as u8 && rewrite::next_hop(skb, &flow.next_mac).is_err() {
            return (Outcome::DropHelper, Leave::NEXT);
        }
        return (outcome, Leave::NEXT);
    };
    match done {
        Ok(verdict) => (outcome, Leave::redirected(verdict)),
        Err(_) => (Outcome::DropHelper, Leave::NEXT),
    }
}

/// The MAC of an endpoint on the client's own bridge. `None`: the bridge does not lead there any more, or the neighbour
/// is not resolved yet; then the stack routes the packet and asks for it.
#[inline(always)]
pub(crate) fn bridge_next_hop<F: Family>(skb: &Skb, flow: &Flow<F>) -> Option<[u8; 6]> {
    let mut fib = Fib::new::<F>(flow.ifindex, &flow.src, &flow.dst);
    let result = skb.route(&mut fib, 0);
    (result == Fib::SUCCESS && fib.ifindex == flow.ifindex).then_some(fib.dmac)
}

//! How the ledger follows the writes: one by one, each after it has taken effect.

use crate::dataplane::MapOp;

use super::Ledger;

impl Ledger {
    /// The write has taken effect. One that failed had none and is not recorded.
    pub fn record(&mut self, op: &MapOp) {
        match op {
            MapOp::PutService { tuple, service } => {
                if self.tuples.insert(*tuple, *service).is_none() && tuple.addr.is_unspecified() {
                    *self.node_port_uses.entry(tuple.port).or_default() += 1;
                    self.node_port_lags.insert(tuple.port);
                }
            }
            MapOp::DeleteService { tuple } => {
                if self.tuples.remove(tuple).is_some() && tuple.addr.is_unspecified() {
                    self.drop_node_port(tuple.port);
                    self.node_port_lags.insert(tuple.port);
                }
            }
            MapOp::PutClusterIp { addr } => {
                self.cluster_ips.insert(*addr);
            }
            MapOp::DeleteClusterIp { addr } => {
                self.cluster_ips.remove(addr);
            }
            MapOp::StorePort { port_id, word, value } => {
                if let Some(held) = self.keys.get(port_id).and_then(|key| self.ports.get_mut(key)) {
                    held.record(*word, *value);
                }
            }
            MapOp::StoreLive { endpoint_id, generation } => {
                let id = *endpoint_id as usize;
                if self.generations.len() <= id {
                    self.generations.resize(id + 1, 0);
                }
                self.generations[id] = *generation;
            }
            MapOp::PutName { port_id, .. } => {
                if let Some(held) = self.keys.get(port_id).and_then(|key| self.ports.get_mut(key)) {
                    held.named = true;
                }
            }
            MapOp::StoreNodePorts { index, bits } => self.record_node_ports(*index, *bits),
            MapOp::StoreFilter { index, buckets } => self.filter.record(*index, *buckets),
            MapOp::PutNodeAddr { addr, flags } => {
                self.node_addrs.insert(*addr, *flags);
            }
            MapOp::DeleteNodeAddr { addr } => {
                self.node_addrs.remove(addr);
            }
            MapOp::PutSourceRange { port_id, net } => {
                if let Some(held) = self.keys.get(port_id).and_then(|key| self.ports.get_mut(key)) {
                    held.source_ranges.insert(*net);
                }
            }
            MapOp::DeleteSourceRange { port_id, net } => {
                if let Some(held) = self.keys.get(port_id).and_then(|key| self.ports.get_mut(key)) {
                    held.source_ranges.remove(net);
                }
                self.stale_ranges.remove(&(*port_id, *net));
            }
            MapOp::PutServiceCidr { net } => {
                self.service_cidrs.insert(*net);
            }
            MapOp::DeleteServiceCidr { net } => {
                self.service_cidrs.remove(net);
            }
            // Slots are known by the runs that name them; a name goes with its port id.
            MapOp::PutSlot { .. } | MapOp::DeleteName { .. } => {}
        }
    }

    fn record_node_ports(&mut self, index: u32, bits: u64) {
        if bits == 0 {
            self.node_ports.remove(&index);
        } else {
            self.node_ports.insert(index, bits);
        }
        let (uses, words) = (&self.node_port_uses, &self.node_ports);
        self.node_port_lags.retain(|port| {
            let word = words.get(&(u32::from(*port) / 64)).copied().unwrap_or(0);
            uses.contains_key(port) != (word >> (port % 64) & 1 != 0)
        });
    }

    fn drop_node_port(&mut self, port: u16) {
        if let Some(uses) = self.node_port_uses.get_mut(&port) {
            *uses -= 1;
            if *uses == 0 {
                self.node_port_uses.remove(&port);
            }
        }
    }
}

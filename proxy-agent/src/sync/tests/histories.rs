//! Random histories, with writes that fail and agents that die: whatever happens on the way, the maps end as they should.
//!
//! Each run draws new ones. One that failed is kept by proptest in `proptest-regressions` and played again by each
//! later run; `PROPTEST_CASES` makes a run longer.

use proptest::prelude::*;

use super::*;

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Service { name: u8, ip: u8, ports: u8, local: bool, node_port: bool, outside: u8 },
    DropService(u8),
    Slice { name: u8, of: u8, port: u8, endpoints: Vec<(u8, u8)> },
    DropSlice(u8),
    Pass(u64),
    Sync,
    Grace,
    Sweep,
    Restart,
    Relist,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = 0u8..4;
    let step = prop_oneof![
        4 => (name.clone(), 0u8..3, 0u8..8, any::<bool>(), any::<bool>(), any::<u8>()).prop_map(
            |(name, ip, ports, local, node_port, outside)| Step::Service { name, ip, ports, local, node_port, outside }
        ),
        2 => name.clone().prop_map(Step::DropService),
        6 => (0u8..5, name, 0u8..3, prop::collection::vec((1u8..9, 0u8..16), 0..6))
            .prop_map(|(name, of, port, endpoints)| Step::Slice { name, of, port, endpoints }),
        2 => (0u8..5).prop_map(Step::DropSlice),
        3 => (0u64..40).prop_map(Step::Pass),
        5 => Just(Step::Sync),
        3 => Just(Step::Grace),
        1 => Just(Step::Sweep),
        1 => Just(Step::Restart),
        1 => Just(Step::Relist),
    ];
    prop::collection::vec(step, 1..60)
}

const PORTS: [&str; 3] = ["http", "dns", "x"];

/// `outside`: bits for an external IP, a balancer's address (of two, which others may claim too), four source ranges (of
/// which one is everybody), affinity and the policy of external addresses.
fn make_service(name: u8, ip: u8, ports: u8, local: bool, node_port: bool, outside: u8) -> Service {
    let ports: Vec<_> = (0..3).filter(|i| ports >> i & 1 != 0).map(|i| (PORTS[i], 80 + i as u16)).collect();
    let mut made = service(&format!("s{name}"), ip, &ports);
    (made.created_secs, made.internal_local) = (i64::from(name % 2), local);
    if node_port {
        made.kind = ServiceType::NodePort;
        made.ports.iter_mut().for_each(|port| port.node_port = 30_000 + port.port);
    }
    let bit = |bit: u8| outside >> bit & 1 != 0;
    made.external_ips = if bit(0) { vec![[203, 0, 113, ip].into()] } else { Vec::new() };
    made.load_balancer_ips = if bit(1) { vec![[203, 0, 113, name % 2].into()] } else { Vec::new() };
    let ranges = ["203.0.113.0/24", "10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0"];
    let asked = (2..).zip(ranges).filter(|(at, _)| bit(*at)).map(|(_, range)| range.parse().unwrap());
    made.source_ranges_asked = asked.collect();
    (made.affinity_secs, made.external_local_asked) = (bit(6).then_some(60), bit(7));
    made
}

fn make_slice(name: u8, of: u8, port: u8, endpoints: &[(u8, u8)]) -> EndpointSlice {
    let endpoints = endpoints.iter().map(|(last, bits)| Endpoint {
        ready: bits & 1 != 0,
        serving: bits & 2 != 0,
        terminating: bits & 4 != 0,
        ..endpoint(*last)
    });
    slice(&format!("e{name}"), &format!("s{of}"), PORTS[port as usize], endpoints.collect())
}

/// What the sources hold, beside the agent.
#[derive(Default)]
struct World {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
}

impl World {
    fn list(&self) -> Vec<Event> {
        let services = self.services.values().cloned().map(|s| Event::InitApply(Object::Service(s)));
        let slices = self.slices.values().cloned().map(|s| Event::InitApply(Object::Slice(s)));
        let mut events = vec![Event::Init(Kind::Service)];
        events.extend(services);
        events.extend([Event::InitDone(Kind::Service), Event::Init(Kind::EndpointSlice)]);
        events.extend(slices);
        events.push(Event::InitDone(Kind::EndpointSlice));
        events.extend(empty_lists().pop());
        events
    }

    fn fresh(&self) -> Rig {
        let mut rig = Rig::new(Capacities::default());
        rig.events(self.list());
        rig.rest();
        rig
    }
}

fn play(steps: &[Step], faults: &[u8], capacities: Capacities) -> (Rig, World) {
    let mut world = World::default();
    let mut rig = Rig::new(capacities);
    if !faults.is_empty() {
        let (faults, mut at) = (faults.to_vec(), 0);
        rig.maps.inject(move |_| {
            at += 1;
            faults[at % faults.len()] == 0
        });
    }
    rig.events(world.list());
    for step in steps {
        match step {
            Step::Service { name, ip, ports, local, node_port, outside } => {
                let made = make_service(*name, *ip, *ports, *local, *node_port, *outside);
                world.services.insert(made.name.clone(), made.clone());
                rig.sync.take(apply_service(made));
            }
            Step::DropService(name) => {
                let name = ObjectName::new("ns", &format!("s{name}"));
                world.services.remove(&name);
                rig.sync.take(Event::Delete(Kind::Service, name));
            }
            Step::Slice { name, of, port, endpoints } => {
                let made = make_slice(*name, *of, *port, endpoints);
                world.slices.insert(made.name.clone(), made.clone());
                rig.sync.take(apply_slice(made));
            }
            Step::DropSlice(name) => {
                let name = ObjectName::new("ns", &format!("e{name}"));
                world.slices.remove(&name);
                rig.sync.take(Event::Delete(Kind::EndpointSlice, name));
            }
            Step::Pass(secs) => rig.now += Duration::from_secs(*secs),
            Step::Sync => rig.sync.step(rig.now),
            Step::Grace => rig.grace(),
            Step::Sweep => rig.sync.sweep_filter(std::iter::empty()),
            Step::Restart => {
                let now = rig.now;
                // A dead agent's grace periods are over long before the next one is up.
                let mut maps = rig.maps.clone();
                maps.grace()().unwrap();
                rig = Rig::over(maps);
                rig.now = now;
                world.list().into_iter().for_each(|event| rig.sync.take(event));
            }
            Step::Relist => world.list().into_iter().for_each(|event| rig.sync.take(event)),
        }
    }
    (rig, world)
}

proptest! {
    /// Whatever happened, in whatever order, with whatever writes failing: the maps end as those of an agent that saw
    /// nothing but the final state.
    #[test]
    fn every_history_ends_like_a_fresh_start(steps in steps(), faults in prop::collection::vec(0u8..8, 0..40)) {
        let (mut rig, world) = play(&steps, &faults, Capacities::default());
        rig.maps.heal();
        rig.events(world.list());
        rig.rest();
        prop_assert_eq!(rig.maps.violations(), Vec::<String>::new());
        let (maps, fresh) = (rig.snapshot(), world.fresh().snapshot());
        prop_assert_eq!(render::inconsistencies(&maps), Vec::<String>::new());
        prop_assert_eq!(render::render(&maps, render::Options::default()), render::render(&fresh, render::Options::default()));
        prop_assert_eq!(maps.names.len(), fresh.names.len(), "names leaked");
        prop_assert_eq!(maps.source_ranges.len(), fresh.source_ranges.len(), "source ranges leaked");
        prop_assert!(maps.ports.keys().all(|id| maps.names.contains_key(id)), "words of ports that are gone");
        let failed = rig.sync.board().entries().into_iter().filter(|entry| entry.error.is_some()).count();
        prop_assert_eq!(failed, 0);

        // When all is gone, every id and slot is free again.
        rig.events(World::default().list());
        rig.rest();
        prop_assert_eq!(rig.sync.ledger().room(), World::default().fresh().sync.ledger().room(), "ids or slots leaked");
    }

    /// The same where little fits: what is served is served whole, and no packet can meet a slot that is being written.
    #[test]
    fn small_maps_never_show_a_half_written_service(steps in steps(), faults in prop::collection::vec(0u8..8, 0..40)) {
        let small = Capacities {
            services: 4,
            cluster_ips: 2,
            ports: 6,
            slots: 10,
            live: 8,
            source_ranges: 3,
            ..Capacities::default()
        };
        let (mut rig, world) = play(&steps, &faults, small);
        rig.maps.heal();
        rig.events(world.list());
        rig.rest();
        prop_assert_eq!(rig.maps.violations(), Vec::<String>::new());
        let maps = rig.snapshot();
        prop_assert_eq!(render::inconsistencies(&maps), Vec::<String>::new());
        for map in [MapName::ServicesV4, MapName::Ports] {
            prop_assert!(maps.services.len() <= small.of(map) as usize || map != MapName::ServicesV4);
        }
    }
}

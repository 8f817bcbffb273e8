//! The thin end towards the kernel: rtnetlink messages become [`Event`]s, and a full reading a list of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_REPLACE, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoGre, InfoGre6, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::proto::sys::SocketAddr;
use rtnetlink::sys::AsyncSocket;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};

use super::inventory::{Address, Event, Framing, Hop, Kind, Link, Route, RouteKey};
use crate::dataplane::attach::Hook;
use crate::dataplane::attach::standing::{Filter, Filters};

/// A question to the kernel that failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] std::io::Error),
    /// A reading failed.
    #[error("cannot read {what} by netlink: {source}")]
    Read {
        /// Links, addresses, routes or filters.
        what: &'static str,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// The kernel closed the socket.
    #[error("the netlink socket was closed")]
    Closed,
}

/// What a message says.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    /// Something changed.
    Event(Event),
    /// A tc filter came or went on this device: its filters are to be read again.
    Filters(u32),
    /// Messages were lost: everything is to be read again.
    Lost,
}

/// A subscription to changes.
pub struct Changes {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
}

impl Changes {
    /// The next change.
    pub async fn next(&mut self) -> Result<Notice, NetlinkError> {
        loop {
            let (message, _) = self.messages.next().await.ok_or(NetlinkError::Closed)?;
            if let Some(notice) = decode(message) {
                return Ok(notice);
            }
        }
    }

    /// A change that has arrived already.
    pub fn try_next(&mut self) -> Option<Notice> {
        while let Ok((message, _)) = self.messages.try_recv() {
            if let Some(notice) = decode(message) {
                return Some(notice);
            }
        }
        None
    }
}

/// Subscribes to links, addresses, routes and filters. The first reading must come after this, so that nothing falls
/// in between.
pub fn subscribe() -> Result<Changes, NetlinkError> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
        MulticastGroup::Tc,
    ];
    let (mut connection, _, messages) = rtnetlink::new_multicast_connection(&groups).map_err(NetlinkError::Open)?;
    // Room for the burst of a node that starts 250 pods at once; the kernel caps it at net.core.rmem_max, and what
    // does not fit is noticed as a loss.
    connection.socket_mut().socket_mut().set_rx_buf_sz(4 << 20).map_err(NetlinkError::Open)?;
    tokio::spawn(connection);
    Ok(Changes { messages })
}

/// A socket for questions, apart from the subscription: a loss there must not look like an answer cut short.
pub fn questions() -> Result<Handle, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Reads everything.
pub async fn read_all(handle: &Handle) -> Result<Vec<Event>, NetlinkError> {
    let failed = |what| move |source| NetlinkError::Read { what, source };
    let mut events = Vec::new();
    let links: Vec<_> = handle.link().get().execute().try_collect().await.map_err(failed("links"))?;
    events.extend(links.iter().filter_map(link).map(Event::Link));
    let addresses: Vec<_> = handle.address().get().execute().try_collect().await.map_err(failed("addresses"))?;
    events.extend(addresses.iter().filter_map(address).map(|(index, address)| Event::Address(index, address)));
    let families = [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ];
    for request in families {
        let mut routes = handle.route().get(request).execute();
        while let Some(message) = routes.try_next().await.map_err(failed("routes"))? {
            events.extend(route(&message).map(|route| Event::Route { route, replace: false }));
        }
    }
    let qdiscs: Vec<_> = handle.qdisc().get().execute().try_collect().await.map_err(failed("queueing disciplines"))?;
    for qdisc in qdiscs.iter().filter(|qdisc| is_clsact(qdisc)) {
        if let Ok(index) = u32::try_from(qdisc.header.index) {
            events.push(Event::Filters { index, filters: read_filters(handle, index).await? });
        }
    }
    Ok(events)
}

/// Reads a device's clsact filters.
pub async fn read_filters(handle: &Handle, index: u32) -> Result<Filters, NetlinkError> {
    let mut filters = Filters::default();
    for hook in Hook::ALL {
        let mut found = handle.traffic_filter(index as i32);
        let request = match hook {
            Hook::Ingress => found.get().ingress(),
            Hook::Egress => found.get().egress(),
        };
        let found: Result<Vec<_>, _> = request.execute().try_collect().await;
        *filters.at_mut(hook) = match found {
            Ok(found) => found.iter().filter_map(filter).collect(),
            // The device went away, or has no clsact. That the kernel could not answer now is no such answer.
            Err(rtnetlink::Error::NetlinkError(error)) if !is_passing(error.raw_code()) => Vec::new(),
            Err(source) => return Err(NetlinkError::Read { what: "filters", source }),
        };
        filters.at_mut(hook).sort_by_key(|filter| filter.priority);
    }
    Ok(filters)
}

/// EBUSY: another answer is still being read from the same socket.
fn is_passing(code: i32) -> bool {
    [libc::EBUSY, libc::EINTR, libc::EAGAIN, libc::ENOBUFS, libc::ENOMEM].contains(&-code)
}

/// All devices by ifindex.
pub async fn links(handle: &Handle) -> Result<BTreeMap<u32, Link>, NetlinkError> {
    let links: Result<Vec<_>, _> = handle.link().get().execute().try_collect().await;
    let links = links.map_err(|source| NetlinkError::Read { what: "links", source })?;
    Ok(links.iter().filter_map(link).map(|link| (link.index, link)).collect())
}

fn filter(message: &TcMessage) -> Option<Filter> {
    let header = &message.header;
    // The priority stands in the upper half of tcm_info, the protocol in the lower. The entry with handle 0 is the
    // priority itself, not a filter.
    let (priority, handle) = ((header.info >> 16) as u16, u32::from(header.handle));
    if handle == 0 {
        return None;
    }
    let mut filter = Filter { priority, handle, name: String::new(), program: 0 };
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) if filter.name.is_empty() => filter.name.clone_from(kind),
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name.clone_from(name),
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = *id,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(filter)
}

fn decode(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Notice> {
    let replace = message.header.flags & NLM_F_REPLACE != 0;
    let message = match message.payload {
        NetlinkPayload::Overrun(_) => return Some(Notice::Lost),
        NetlinkPayload::InnerMessage(message) => message,
        _ => return None,
    };
    let event = match message {
        RouteNetlinkMessage::NewLink(message) => Event::Link(link(&message)?),
        // A bridge says so, with its own family, when a port leaves it: the device is still there.
        RouteNetlinkMessage::DelLink(message) if message.header.interface_family == AddressFamily::Unspec => {
            Event::LinkGone(message.header.index)
        }
        RouteNetlinkMessage::NewAddress(message) => address(&message).map(|(index, a)| Event::Address(index, a))?,
        RouteNetlinkMessage::DelAddress(message) => address(&message).map(|(i, a)| Event::AddressGone(i, a.addr))?,
        RouteNetlinkMessage::NewRoute(message) => Event::Route { route: route(&message)?, replace },
        RouteNetlinkMessage::DelRoute(message) => Event::RouteGone(route(&message)?),
        RouteNetlinkMessage::NewTrafficFilter(message) | RouteNetlinkMessage::DelTrafficFilter(message) => {
            return filters_of(&message);
        }
        // Its filters go with it, and nothing is said of them.
        RouteNetlinkMessage::DelQueueDiscipline(message) if is_clsact(&message) => {
            return u32::try_from(message.header.index).ok().map(Notice::Filters);
        }
        _ => return None,
    };
    Some(Notice::Event(event))
}

fn is_clsact(qdisc: &TcMessage) -> bool {
    qdisc.attributes.contains(&TcAttribute::Kind("clsact".to_owned()))
}

/// The device whose filters changed; filters of shared blocks have none.
fn filters_of(message: &TcMessage) -> Option<Notice> {
    let hooks = [TcHandle::MIN_INGRESS, TcHandle::MIN_EGRESS].map(|minor| TcHandle { major: u16::MAX, minor });
    let index = u32::try_from(message.header.index).ok().filter(|index| *index != 0)?;
    hooks.contains(&message.header.parent).then_some(Notice::Filters(index))
}

fn link(message: &LinkMessage) -> Option<Link> {
    let header = &message.header;
    if header.interface_family != AddressFamily::Unspec {
        return None;
    }
    let mut link = Link {
        index: header.index,
        name: String::new(),
        kind: Kind::Physical,
        loopback: header.flags.contains(LinkFlags::Loopback),
        framing: framing(header.link_layer_type),
        mac: [0; 6],
        master: None,
        up: header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkInfo(infos) => {
                let found = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(found) => Some(kind(found)),
                    _ => None,
                });
                link.kind = found.unwrap_or(Kind::Physical);
                if infos.iter().any(|info| matches!(info, LinkInfo::Data(data) if is_gre_to_anybody(data))) {
                    link.framing = Framing::Other;
                }
            }
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

/// As the kernel's own `dev_is_mac_header_xmit` has it, which redirects obey.
fn framing(layer: LinkLayerType) -> Framing {
    match layer {
        // The packets of lo do begin with one.
        LinkLayerType::Ether | LinkLayerType::Loopback => Framing::Ethernet,
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => Framing::Flat,
        _ => Framing::Other,
    }
}

/// GRE whose remote end is told packet by packet: the outer header stands before each packet already at the hooks.
fn is_gre_to_anybody(data: &InfoData) -> bool {
    let (to, metadata) = match data {
        InfoData::GreTun(infos) => (
            infos.iter().any(|i| matches!(i, InfoGre::Remote(to) if !to.is_unspecified())),
            infos.contains(&InfoGre::CollectMetadata),
        ),
        InfoData::GreTun6(infos) => (
            infos.iter().any(|i| matches!(i, InfoGre6::Remote(to) if !to.is_unspecified())),
            infos.contains(&InfoGre6::CollectMetadata),
        ),
        _ => return false,
    };
    !to && !metadata
}

fn kind(kind: &InfoKind) -> Kind {
    match kind {
        InfoKind::Veth => Kind::Veth,
        InfoKind::Bridge => Kind::Bridge,
        InfoKind::Bond | InfoKind::Team => Kind::Aggregate,
        InfoKind::Tun => Kind::Tun,
        InfoKind::Netkit => Kind::Netkit,
        InfoKind::Vxlan
        | InfoKind::Geneve
        | InfoKind::IpIp
        | InfoKind::Ip6Tnl
        | InfoKind::SitTun
        | InfoKind::GreTun
        | InfoKind::GreTun6
        | InfoKind::GreTap
        | InfoKind::GreTap6
        | InfoKind::ErSpan
        | InfoKind::Ip6ErSpan
        | InfoKind::Vti
        | InfoKind::Vti6
        | InfoKind::Wireguard
        | InfoKind::Xfrm
        | InfoKind::BareUdp => Kind::Tunnel,
        InfoKind::Dummy | InfoKind::Ifb | InfoKind::Nlmon | InfoKind::Vrf | InfoKind::Vcan | InfoKind::Vxcan => {
            Kind::Inert
        }
        _ => Kind::Other,
    }
}

fn address(message: &AddressMessage) -> Option<(u32, Address)> {
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(addr) => local = Some(*addr),
            AddressAttribute::Address(addr) => peer = Some(*addr),
            _ => {}
        }
    }
    let header = &message.header;
    // IFA_ADDRESS is the other end's on a point-to-point device; IFA_LOCAL is ours, absent for IPv6 elsewhere.
    let addr = local.or(peer)?;
    let unfit = AddressHeaderFlags::Secondary | AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated;
    let address = Address {
        addr,
        prefix: header.prefix_len,
        global: matches!(header.scope, AddressScope::Universe | AddressScope::Site | AddressScope::Other(_)),
        secondary: header.flags.intersects(unfit),
    };
    Some((header.index, address))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(addr) => Some((*addr).into()),
        RouteAddress::Inet6(addr) => Some((*addr).into()),
        _ => None,
    }
}

/// A route that may decide on a role or a source: one to everything, through a router, or with a preferred source.
/// Others (a node may have one per pod) are not kept.
fn route(message: &RouteMessage) -> Option<Route> {
    const LOCAL_TABLE: u32 = 255;
    let header = &message.header;
    let mut key = RouteKey {
        dst: match header.address_family {
            AddressFamily::Inet => IpNet::new(IpAddr::from([0; 4]), header.destination_prefix_length).ok()?,
            AddressFamily::Inet6 => IpNet::new(IpAddr::from([0; 16]), header.destination_prefix_length).ok()?,
            _ => return None,
        },
        table: header.table.into(),
        metric: 0,
    };
    let (mut single, mut source) = (Hop { oif: 0, gateway: false, source: None }, None);
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(dst) => {
                key.dst = IpNet::new(ip(dst)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Table(table) => key.table = *table,
            RouteAttribute::Priority(metric) => key.metric = *metric,
            RouteAttribute::Oif(oif) => single.oif = *oif,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => single.gateway = true,
            RouteAttribute::PrefSource(addr) => source = ip(addr),
            RouteAttribute::MultiPath(ways) => hops.extend(ways.iter().map(|way| Hop {
                oif: way.interface_index,
                gateway:
                    way.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_))),
                source: None,
            })),
            _ => {}
        }
    }
    if header.kind != RouteType::Unicast || key.table == LOCAL_TABLE {
        return None;
    }
    if hops.is_empty() {
        hops.push(single);
    }
    for hop in &mut hops {
        hop.source = source;
    }
    hops.retain(|hop| hop.oif != 0 && (hop.gateway || hop.source.is_some() || key.dst.prefix_len() == 0));
    (!hops.is_empty()).then_some(Route { key, hops })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::NetlinkHeader;
    use rtnetlink::{LinkMessageBuilder, LinkVeth};

    use super::*;

    fn notice(message: RouteNetlinkMessage) -> Option<Notice> {
        decode(NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(message)))
    }

    fn veth() -> LinkMessage {
        let mut message = LinkMessageBuilder::<LinkVeth>::new("veth9", "peer").index(9).up().build();
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes.push(LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]));
        message.attributes.push(LinkAttribute::Controller(3));
        message
    }

    #[test]
    fn a_link_message_becomes_a_link() {
        let Some(Notice::Event(Event::Link(link))) = notice(RouteNetlinkMessage::NewLink(veth())) else {
            panic!("no link");
        };
        let expected = Link {
            index: 9,
            name: "veth9".to_owned(),
            kind: Kind::Veth,
            loopback: false,
            framing: Framing::Ethernet,
            mac: [2, 0, 0, 0, 0, 9],
            master: Some(3),
            up: true,
        };
        assert_eq!(link, expected);
    }

    #[test]
    fn a_port_that_leaves_its_bridge_is_still_a_device() {
        let mut message = veth();
        message.header.interface_family = AddressFamily::Bridge;
        assert_eq!(notice(RouteNetlinkMessage::DelLink(message.clone())), None);
        assert_eq!(notice(RouteNetlinkMessage::NewLink(message.clone())), None);
        message.header.interface_family = AddressFamily::Unspec;
        assert_eq!(notice(RouteNetlinkMessage::DelLink(message)), Some(Notice::Event(Event::LinkGone(9))));
    }

    #[test]
    fn filters_go_with_their_queueing_discipline() {
        let mut message = TcMessage::default();
        message.header.index = 9;
        assert_eq!(notice(RouteNetlinkMessage::DelQueueDiscipline(message.clone())), None, "of another kind");
        message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        assert_eq!(notice(RouteNetlinkMessage::DelQueueDiscipline(message)), Some(Notice::Filters(9)));
    }

    #[test]
    fn a_loss_is_noticed() {
        let lost = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::Overrun(Vec::new()));
        assert_eq!(decode(lost), Some(Notice::Lost));
    }

    #[test]
    fn only_routes_that_decide_something_are_kept() {
        let base = || RouteMessageBuilder::<std::net::Ipv4Addr>::new().output_interface(2);
        let to = |third: u8| base().destination_prefix(std::net::Ipv4Addr::new(10, 0, third, 0), 24);
        assert_eq!(route(&to(1).build()), None, "a plain on-link route");
        let gateway = route(&to(1).gateway(std::net::Ipv4Addr::new(192, 0, 2, 254)).build()).unwrap();
        assert_eq!(gateway.hops, [Hop { oif: 2, gateway: true, source: None }]);
        assert_eq!(gateway.key.dst.to_string(), "10.0.1.0/24");
        let source = std::net::Ipv4Addr::new(192, 0, 2, 1);
        let preferred = route(&to(2).pref_source(source).build()).unwrap();
        assert_eq!(preferred.hops[0].source, Some(source.into()));
        assert!(route(&base().build()).unwrap().key.dst.prefix_len() == 0, "a default route without a router");
        assert_eq!(route(&base().table_id(255).build()), None, "the local table");
        assert_eq!(route(&base().kind(RouteType::BlackHole).build()), None);
    }

    #[test]
    fn addresses_that_no_packet_should_start_from_are_marked() {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        message.header.prefix_len = 24;
        message.attributes.push(AddressAttribute::Address(IpAddr::from([192, 0, 2, 1])));
        let plain = address(&message).unwrap();
        assert!(plain.1.global && !plain.1.secondary);
        message.header.flags = AddressHeaderFlags::Tentative;
        assert!(address(&message).unwrap().1.secondary);
        message.header.scope = AddressScope::Link;
        assert!(!address(&message).unwrap().1.global);
        message.attributes.push(AddressAttribute::Local(IpAddr::from([192, 0, 2, 9])));
        assert_eq!(address(&message).unwrap().1.addr, IpAddr::from([192, 0, 2, 9]), "our end of a point-to-point link");
    }
}

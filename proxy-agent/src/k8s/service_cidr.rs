//! ServiceCIDRs: kube-proxy's rule 3.

use k8s_openapi::api::networking::v1 as networking;

use super::{Decoded, Warning, parse_network};
use crate::model::{NameError, ObjectName, ServiceCidr};

/// Longest name of a ServiceCIDR, a DNS subdomain.
const MAX_NAME: usize = 253;

/// Why a ServiceCIDR cannot be used at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceCidrError {
    /// Its name.
    #[error("metadata: {0}")]
    Name(#[from] NameError),
}

/// Decodes a ServiceCIDR. Its conditions are not looked at, and one that is being deleted counts until it is gone:
/// Services may still have addresses of it.
pub fn decode(object: &networking::ServiceCIDR) -> Result<Decoded<ServiceCidr>, ServiceCidrError> {
    let name = ObjectName::checked_cluster_wide(object.metadata.name.as_deref().unwrap_or_default(), MAX_NAME)?;
    let (mut cidrs, mut warnings) = (Vec::new(), Vec::new());
    let listed = object.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    for (i, text) in listed.enumerate() {
        match parse_network(text) {
            Ok(cidr) => cidrs.push(cidr),
            Err(error) => warnings.push(Warning { field: format!("spec.cidrs[{i}]"), problem: error.to_string() }),
        }
    }
    Ok(Decoded { object: Some(ServiceCidr { name, cidrs }), warnings })
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::*;

    fn decoded(cidrs: &[&str]) -> Decoded<ServiceCidr> {
        let value = serde_json::json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": cidrs}});
        decode(&serde_json::from_value(value).unwrap()).unwrap()
    }

    #[test]
    fn networks_of_both_families_are_read() {
        for (text, network) in [
            ("10.96.0.0/16", "10.96.0.0/16"),
            ("fd00:10:96::/108", "fd00:10:96::/108"),
            ("10.96.1.2/16", "10.96.0.0/16"),
            ("010.096.0.0/16", "10.96.0.0/16"),
            ("10.0.0.1/32", "10.0.0.1/32"),
        ] {
            let read = decoded(&[text]);
            assert_eq!(read.object.unwrap().cidrs, [network.parse::<IpNet>().unwrap()], "{text}");
            assert!(read.warnings.is_empty(), "{text}");
        }
    }

    #[test]
    fn what_is_no_network_is_left_out_with_a_warning() {
        for text in ["", "10.96.0.0", "10.96.0.0/33", "10.96.0.0/", "10.96.0.0/+8", "fd00::/129", "web/8"] {
            let read = decoded(&[text, "10.96.0.0/16"]);
            assert_eq!(read.object.unwrap().cidrs.len(), 1, "{text}");
            assert_eq!(read.warnings[0].field, "spec.cidrs[0]", "{text}");
        }
        assert!(decoded(&[]).object.unwrap().cidrs.is_empty());
    }

    #[test]
    fn one_without_a_name_is_refused() {
        decode(&networking::ServiceCIDR::default()).unwrap_err();
    }
}

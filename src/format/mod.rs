//! PURE: bytes <-> values. Every on-disk structure is declared once, here. Knows nothing of I/O.

pub mod bitmap;
pub mod extension;
pub mod geometry;
pub mod header;
pub mod l2;
pub mod l2_table;
pub mod layout;
pub mod refcount;
pub mod snapshot;
pub mod units;

pub use extension::Extension;
pub use geometry::Geometry;
pub use header::{BackingName, Compression, Header};
pub use l2::{ClusterState, Host, L2Entry};
pub use snapshot::Snapshot;
pub use units::{GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, SliceIndex, words};

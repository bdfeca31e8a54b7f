// SPDX-License-Identifier: GPL-2.0-only

//! The state of one side of a device.
//!
//! Header: `xen/include/public/io/xenbus.h`

/// The state of one side of a device, as in its node `state` (`enum xenbus_state`).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum XenbusState {
    /// There is no such node, or it cannot be read.
    Unknown = 0,
    /// The side was created, or restarts.
    Initialising = 1,
    /// A backend has written its offer and waits for the frontend.
    InitWait = 2,
    /// A frontend has written its rings and event channels and waits for the backend.
    Initialised = 3,
    /// The side is ready for I/O.
    Connected = 4,
    /// The side is closing, or the toolstack wants it to.
    Closing = 5,
    /// The side has ended all uses of the other side's resources.
    Closed = 6,
    /// The bus is being changed. Only PCI devices use this.
    Reconfiguring = 7,
    /// The bus has been changed. Only PCI devices use this.
    Reconfigured = 8,
}

impl XenbusState {
    /// All states, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        XenbusState::Unknown,
        XenbusState::Initialising,
        XenbusState::InitWait,
        XenbusState::Initialised,
        XenbusState::Connected,
        XenbusState::Closing,
        XenbusState::Closed,
        XenbusState::Reconfiguring,
        XenbusState::Reconfigured,
    ];

    /// Returns the number of the state, as in xenstore.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

impl TryFrom<u32> for XenbusState {
    type Error = UnknownState;

    fn try_from(number: u32) -> Result<Self, UnknownState> {
        let state = usize::try_from(number)
            .ok()
            .and_then(|number| Self::ALL.get(number));
        state.copied().ok_or(UnknownState)
    }
}

/// The error for a node `state` whose text is not the number of a [`XenbusState`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UnknownState;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_states() {
        for (number, state) in XenbusState::ALL.into_iter().enumerate() {
            assert_eq!(XenbusState::try_from(number as u32), Ok(state));
            assert_eq!(state.number(), number as u32);
        }
        for number in [9, u32::MAX] {
            assert_eq!(XenbusState::try_from(number), Err(UnknownState));
        }
    }
}

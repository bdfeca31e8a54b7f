// SPDX-License-Identifier: GPL-2.0-only

#include <xen/events.h>

int rust_helper_evtchn_alloc_unbound(domid_t remote, evtchn_port_t *port)
{
	struct evtchn_alloc_unbound alloc = {
		.dom = DOMID_SELF,
		.remote_dom = remote,
	};
	int err = HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &alloc);

	if (!err)
		*port = alloc.port;
	return err;
}

void rust_helper_notify_remote_via_evtchn(evtchn_port_t port)
{
	notify_remote_via_evtchn(port);
}

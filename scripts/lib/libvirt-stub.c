// SPDX-License-Identifier: GPL-2.0-only
/*
 * Preloaded into libvirtd, it answers what libvirt's driver for Xen asks libxl for when it starts:
 * a host with one CPU and no domain but domain 0. So the driver converts configurations on a
 * machine without Xen.
 */

#include <libxl.h>
#include <libxl_event.h>
#include <stdlib.h>
#include <string.h>

int libxl_ctx_alloc(libxl_ctx **ctx, int version, unsigned flags, xentoollog_logger *logger)
{
	/* Opaque, and larger than that of libxl, whose other functions read it. */
	*ctx = calloc(1, 1 << 16);
	return 0;
}

int libxl_ctx_free(libxl_ctx *ctx)
{
	free(ctx);
	return 0;
}

const libxl_version_info *libxl_get_version_info(libxl_ctx *ctx)
{
	static char extra[] = ".0", commandline[] = "";
	static libxl_version_info info = {
		.xen_version_major = 4,
		.xen_version_minor = 20,
		.xen_version_extra = extra,
		.commandline = commandline,
	};

	/* The caller divides it into words. */
	info.capabilities = strdup("xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_64");
	return &info;
}

int libxl_get_physinfo(libxl_ctx *ctx, libxl_physinfo *info)
{
	memset(info, 0, sizeof(*info));
	info->nr_cpus = info->cores_per_socket = info->threads_per_core = info->nr_nodes = 1;
	info->total_pages = 1 << 18;
	info->cap_hvm = info->cap_pv = true;
	return 0;
}

libxl_numainfo *libxl_get_numainfo(libxl_ctx *ctx, int *nr)
{
	libxl_numainfo *node = calloc(1, sizeof(*node));

	node->size = 1 << 30;
	node->num_dists = 1;
	node->dists = calloc(1, sizeof(*node->dists));
	*nr = 1;
	return node;
}

libxl_cputopology *libxl_get_cpu_topology(libxl_ctx *ctx, int *nr)
{
	*nr = 1;
	return calloc(1, sizeof(libxl_cputopology));
}

int libxl_domain_info(libxl_ctx *ctx, libxl_dominfo *info, uint32_t domid)
{
	memset(info, 0, sizeof(*info));
	info->running = true;
	info->current_memkb = info->max_memkb = 1 << 20;
	return 0;
}

libxl_vcpuinfo *libxl_list_vcpu(libxl_ctx *ctx, uint32_t domid, int *nr, int *cpus)
{
	*nr = *cpus = 1;
	return calloc(1, sizeof(libxl_vcpuinfo));
}

int libxl_userdata_retrieve(libxl_ctx *ctx, uint32_t domid, const char *name, uint8_t **data,
			    int *length)
{
	*data = NULL;
	*length = 0;
	return 0;
}

int libxl_evenable_domain_death(libxl_ctx *ctx, uint32_t domid, libxl_ev_user user,
				libxl_evgen_domain_death **event)
{
	*event = NULL;
	return 0;
}

void libxl_evdisable_domain_death(libxl_ctx *ctx, libxl_evgen_domain_death *event)
{
}

void libxl_osevent_register_hooks(libxl_ctx *ctx, const libxl_osevent_hooks *hooks, void *user)
{
}

void libxl_event_register_callbacks(libxl_ctx *ctx, const libxl_event_hooks *hooks, void *user)
{
}

void libxl_childproc_setmode(libxl_ctx *ctx, const libxl_childproc_hooks *hooks, void *user)
{
}

// Command controlplane runs a real Kubernetes API server and the etcd below it in one process, for tests.
//
// It listens on loopback, writes a kubeconfig for each identity (credentials.go) into the folder of its data and prints
// one line on standard output once /readyz says yes:
//
//	ready URL ETCD_URL
//
// It ends with code 0 on SIGTERM and SIGINT, and by itself when the thread that started it ends.
// A second start on the same --data-dir goes on with the same objects, keys and tokens.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// settings is what the command line says, complete after parse.
type settings struct {
	dataDir      string
	bindAddress  string
	port         int
	etcdPort     int
	serviceCIDRs string
	auditLog     string
	readyTimeout time.Duration
}

// component is one server of the control plane. run returns when ctx is done, or earlier with the reason.
// The list in components is the only place that knows which there are.
type component struct {
	name string
	run  func(ctx context.Context) error
}

func parse(args []string) (settings, error) {
	var s settings
	flags := flag.NewFlagSet("controlplane", flag.ContinueOnError)
	flags.StringVar(&s.dataDir, "data-dir", "", "folder for etcd's data, keys and tokens (required; made if missing)")
	flags.StringVar(&s.bindAddress, "bind-address", "127.0.0.1", "address of the API server; etcd stays on loopback")
	flags.IntVar(&s.port, "port", 0, "port of the API server; 0 picks a free one")
	flags.IntVar(&s.etcdPort, "etcd-port", 0, "port of etcd; 0 picks a free one")
	flags.StringVar(&s.serviceCIDRs, "service-cluster-ip-range", "10.96.0.0/16,fd00:10:96::/108",
		"ranges that ClusterIPs come from, one per family")
	flags.StringVar(&s.auditLog, "audit-log", "", "where to write one line for each request that was answered (default: nowhere)")
	flags.DurationVar(&s.readyTimeout, "ready-timeout", 2*time.Minute, "give up when /readyz has not said yes by then")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	if flags.NArg() > 0 {
		return s, fmt.Errorf("unexpected argument %q: only flags are taken", flags.Arg(0))
	}
	if s.dataDir == "" {
		return s, errors.New("--data-dir is missing: give a folder for etcd's data, keys and tokens")
	}
	var err error
	if s.dataDir, err = filepath.Abs(s.dataDir); err != nil {
		return s, fmt.Errorf("make --data-dir absolute: %w", err)
	}
	return s, nil
}

func init() {
	// The signal belongs to the thread that asks for it, so it must be asked for on the main thread, which never ends:
	// init runs there.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		fmt.Fprintf(os.Stderr, "controlplane: ask for a signal when the parent ends: %v\n", err)
		os.Exit(1)
	}
}

func main() {
	s, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "controlplane: %v\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintf(os.Stderr, "controlplane: %v\n", err)
		os.Exit(1)
	}
	klog.Flush()
}

func run(ctx context.Context, s settings) error {
	if err := os.MkdirAll(s.dataDir, 0o700); err != nil {
		return fmt.Errorf("make --data-dir: %w", err)
	}
	etcd, err := startEtcd(s)
	if err != nil {
		return err
	}
	// Last, so that the API server can still write while it says goodbye.
	defer etcd.close()
	api, err := newAPIServer(ctx, s, etcd.url)
	if err != nil {
		return err
	}

	group, ctx := errgroup.WithContext(ctx)
	for _, c := range components(api) {
		group.Go(func() error {
			if err := c.run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			return nil
		})
	}
	group.Go(func() error {
		if err := api.waitReady(ctx, s.readyTimeout); err != nil {
			// A stop before the server was ready is no failure.
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if err := api.writeKubeconfigs(s.dataDir); err != nil {
			return err
		}
		_, err := fmt.Printf("ready %s %s\n", api.url, etcd.url)
		return err
	})
	return group.Wait()
}

func components(api *apiServer) []component {
	return []component{
		{name: "kube-apiserver", run: api.run},
	}
}

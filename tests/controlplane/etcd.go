package main

import (
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcd is the store below the API server.
type etcd struct {
	server *embed.Etcd
	url    string
}

func startEtcd(s settings) (*etcd, error) {
	cfg := embed.NewConfig()
	cfg.Name = "test"
	cfg.Dir = filepath.Join(s.dataDir, "etcd")
	cfg.LogLevel = "warn"
	// The command line sets this default, the package does not; zero means every request.
	cfg.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	// Nothing here outlives the machine: what a killed process wrote is in the page cache.
	cfg.UnsafeNoFsync = true
	client := url.URL{Scheme: "http", Host: fmt.Sprintf("127.0.0.1:%d", s.etcdPort)}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)

	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		return nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, err)
	case <-time.After(time.Minute):
		server.Close()
		return nil, fmt.Errorf("start etcd in %s: not ready after a minute", cfg.Dir)
	}
	return &etcd{server: server, url: "http://" + server.Clients[0].Addr().String()}, nil
}

func (e *etcd) close() {
	e.server.Close()
}

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/rest"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
)

// auditPolicy has one line for each request: who, what, and how it was answered.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules: [{level: Metadata}]
`

// apiServer is one kube-apiserver, configured through the flags of the real binary.
type apiServer struct {
	options options.CompletedOptions
	url     string
	caFile  string
	tokens  tokens
}

func newAPIServer(ctx context.Context, s settings, etcdURL string) (*apiServer, error) {
	port, err := freePort(s.bindAddress, s.port)
	if err != nil {
		return nil, err
	}
	tokens, err := loadTokens(filepath.Join(s.dataDir, "tokens.csv"))
	if err != nil {
		return nil, err
	}
	// The server makes its own certificate there when there is none; the file holds the certificate and its CA.
	certDir := filepath.Join(s.dataDir, "certs")
	certFile, keyFile := filepath.Join(certDir, "apiserver.crt"), filepath.Join(certDir, "apiserver.key")
	args := []string{
		"--etcd-servers=" + etcdURL,
		"--bind-address=" + s.bindAddress,
		"--advertise-address=" + s.bindAddress,
		"--secure-port=" + strconv.Itoa(port),
		"--cert-dir=" + certDir,
		"--service-cluster-ip-range=" + s.serviceCIDRs,
		"--authorization-mode=RBAC",
		// As kubeadm and every distribution has it: proxies and CNIs are privileged.
		"--allow-privileged=true",
		"--token-auth-file=" + tokens.path,
		// Tokens of ServiceAccounts (TokenRequest) are signed with the serving key: one secret less to make.
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + keyFile,
		"--service-account-signing-key-file=" + keyFile,
		// No controller makes the default ServiceAccounts that this plugin would wait for.
		"--disable-admission-plugins=ServiceAccount",
		// Also how long a stop waits for watches that nobody ends; the default of a minute is for real clients.
		"--request-timeout=5s",
	}
	if s.auditLog != "" {
		policy := filepath.Join(s.dataDir, "audit-policy.yaml")
		if err := os.WriteFile(policy, []byte(auditPolicy), 0o600); err != nil {
			return nil, fmt.Errorf("write the audit policy: %w", err)
		}
		args = append(args, "--audit-policy-file="+policy, "--audit-log-path="+s.auditLog)
	}
	if ip := net.ParseIP(s.bindAddress); ip == nil || ip.IsLoopback() {
		// The API forbids loopback addresses in the endpoints of the Service "kubernetes".
		args = append(args, "--endpoint-reconciler-type=none")
	}

	opts := options.NewServerRunOptions()
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range opts.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	if err := flags.Parse(args); err != nil {
		return nil, fmt.Errorf("flags of kube-apiserver: %w", err)
	}
	if err := opts.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, fmt.Errorf("feature gates of kube-apiserver: %w", err)
	}
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	completed, err := opts.Complete(ctx)
	if err != nil {
		return nil, fmt.Errorf("options of kube-apiserver: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return nil, fmt.Errorf("options of kube-apiserver: %w", utilerrors.NewAggregate(errs))
	}
	host := net.JoinHostPort(s.bindAddress, strconv.Itoa(port))
	return &apiServer{options: completed, url: "https://" + host, caFile: certFile, tokens: tokens}, nil
}

func (a *apiServer) run(ctx context.Context) error {
	return app.Run(ctx, a.options)
}

// waitReady returns once /readyz answers 200.
func (a *apiServer) waitReady(ctx context.Context, timeout time.Duration) error {
	ca, err := os.ReadFile(a.caFile)
	if err != nil {
		return fmt.Errorf("read the API server's certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return fmt.Errorf("read the API server's certificate: no PEM certificate in %s", a.caFile)
	}
	client := http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}},
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last := errors.New("not asked yet")
	for {
		if last = a.askReady(ctx, &client); last == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s/readyz did not answer 200 within %s: %w", a.url, timeout, last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (a *apiServer) askReady(ctx context.Context, client *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+"/readyz", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.tokens.byUser[admin.user])
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	if err := resp.Body.Close(); err != nil {
		klog.V(2).InfoS("close the answer of /readyz", "err", err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %s", resp.Status)
	}
	return nil
}

// freePort returns wanted, or a port that is free now where wanted is 0.
func freePort(address string, wanted int) (int, error) {
	if wanted != 0 {
		return wanted, nil
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return 0, fmt.Errorf("find a free port on %s: %w", address, err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := listener.Close(); err != nil {
		return 0, fmt.Errorf("find a free port on %s: %w", address, err)
	}
	return port, nil
}
